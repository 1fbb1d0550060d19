#include "activation.cuh"

HECATE_ACTIVATION(HECATE_KERNEL)
