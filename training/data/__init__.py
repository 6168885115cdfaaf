"""Data sets, and the arrays that training makes of them."""
