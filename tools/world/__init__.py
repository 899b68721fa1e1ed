"""A small world to learn: drawn pictures and videos, synthetic sounds and speech, and questions about them."""
