"""The process mesh, how ranks meet, and the collectives between them."""
