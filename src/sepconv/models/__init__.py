"""Models that exist: fused layers put into them and taken out, their files read and written."""
