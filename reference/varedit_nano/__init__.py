"""nano: the small demonstration model, trained on drawn scenes."""
