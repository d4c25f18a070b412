"""Data files, tokenized texts, templates. Needs no Paddle."""
