"""Images with masks that anyone can make again: textured shapes, drawn from formulas."""
