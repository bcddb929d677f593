"""Example projections over a shop's orders and CDNOW's purchases."""
