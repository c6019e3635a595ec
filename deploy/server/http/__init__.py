"""HTTP: bytes to requests (`protocol`), who may ask and errors as answers (`exchange`), JSON in parts (`bodies`)."""
