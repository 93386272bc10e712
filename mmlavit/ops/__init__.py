"""Operations of the model: what computes them, fast forms beside plain ones."""
