"""How the bundled checkpoint was made: scenes, questions, tokenizer, training. Not part of the installed package."""
