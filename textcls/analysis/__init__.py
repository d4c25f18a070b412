"""How a model's answers are explained, its data cleaned and more data made."""
