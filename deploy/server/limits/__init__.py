"""What a request may cost (`bounds`), what all of them hold together (`budget`), and who they are from (`callers`)."""
