"""The reception of calls: bounds what a connection may hold, gives calls threads, and ends those that hang."""
