"""What other libraries need to work with our adapters; each module imports its friend."""
