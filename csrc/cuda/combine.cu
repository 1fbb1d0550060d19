#include "combine.cuh"

HECATE_COMBINE(HECATE_KERNEL)
