"""What `make demo` runs, and the pictures it makes."""
