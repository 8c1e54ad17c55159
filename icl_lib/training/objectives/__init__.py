"""What SAEs are trained for, one file an objective."""
