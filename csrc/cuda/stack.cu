#include "stack.cuh"

HECATE_STACK(HECATE_KERNEL)
