"""The table of ``make bench``: fastgen against PyTorch on CPU, with what each row should reach."""
