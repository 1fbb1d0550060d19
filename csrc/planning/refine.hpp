// A local search that improves copies for guessed loads.
#pragma once

#include "planning/ensemble.hpp"
#include "planning/limits.hpp"

namespace hecate {

// Gives slots of copies to other experts as long as that lowers the sum, over the guesses of `ensemble`, of their
// largest device loads; at most `trials` changes are tried. The first `fixed` pairs, the owners' among them, stay as they
// are. `limits` are those before any other copy was made.
void refine(Ensemble& ensemble, Holding& holding, int fixed, const Limits& limits, int trials);

}  // namespace hecate
