"""moestro: sparse mixture-of-experts models from plan to device."""

__version__ = "0.1.0"
