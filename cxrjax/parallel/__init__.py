"""The mesh of devices and what lies where on it."""
