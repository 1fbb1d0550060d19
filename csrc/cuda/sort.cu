#include "sort.cuh"

HECATE_SORT(HECATE_KERNEL)
