"""Load test of an embedding or classification server: ``locust -f loadtest/locustfile.py --host http://... --help``."""
