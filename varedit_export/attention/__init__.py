"""Maps of what a model attends to: `maps.py` computes them in the reference, `drawing.py` draws."""
