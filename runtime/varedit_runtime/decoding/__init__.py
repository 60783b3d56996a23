"""Decode picture files from strangers.

    bytes -> a reader of their format (png, jpeg, tiff, heif, other_formats) -> Pillow -> RGB(A)

A reader walks over a file's structure before Pillow sees it. It refuses what would cost too much
to decode, says how much memory decoding takes, and leaves out everything that is not needed for
the pixels: comments, thumbnails, further frames, damaged optional parts. `limits.py` holds the
limits, `exif.py` reads the orientation, `picture_file.py` opens and decodes what a reader let
pass, `to_rgb.py` converts it.
"""
