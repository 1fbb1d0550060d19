// The arrays of a plan, sums over them, and the rules that make a plan valid.
#pragma once

#include <cstdint>
#include <string>

#include "planning/quota.hpp"

namespace hecate {

// A plan's arrays, as in hecate/planning/plan.py: holders [pairs, 2], quota [devices, pairs].
struct PlanArrays {
  const bool* placement;
  const std::int64_t *owners, *holders, *quota, *device_loads;
  std::int64_t pairs;
};

// Number of tokens that each device computes, int64 [devices].
Tokens device_loads(const PlanArrays& plan, const Shape& shape);

// Number of (expert, node) pairs in which the node holds a copy but not the owner.
std::int64_t count_crossings(const PlanArrays& plan, const Shape& shape);

// The first rule that the plan breaks, in words; empty if the plan is valid.
std::string plan_fault(const PlanArrays& plan, const Shape& shape);

}  // namespace hecate
