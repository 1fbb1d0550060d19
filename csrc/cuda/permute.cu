#include "permute.cuh"

HECATE_PERMUTE(HECATE_KERNEL)
