#include "symmetric.cuh"

HECATE_SYMMETRIC(HECATE_PULL_KERNEL)
