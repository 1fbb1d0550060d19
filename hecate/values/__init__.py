"""The values of a model by original names: initial ones, finite ones, whole ones, and the memory they take."""
