"""An exported folder answers. Needs no Paddle."""
