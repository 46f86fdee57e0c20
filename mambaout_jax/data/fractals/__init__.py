"""Images that anyone can make again: fractals of 100 classes, drawn from formulas."""
