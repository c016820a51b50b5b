"""What `make demo` runs, and the images it makes."""
