// What a plan is made of and what makes it valid.
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

// Tokens each device computes, int64 [devices].
Tokens device_loads(const PlanArrays& plan, const Shape& shape);

// Pairs of an expert and a node that holds it but not its owner.
std::int64_t count_crossings(const PlanArrays& plan, const Shape& shape);

// The first rule that the plan breaks, in words; empty if it is valid.
std::string plan_fault(const PlanArrays& plan, const Shape& shape);

}  // namespace hecate
