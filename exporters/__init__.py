"""What turns an artifact into graphs for runtimes."""
