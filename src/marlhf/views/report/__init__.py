"""`marlhf report`: runs -> groups -> charts -> a page."""
