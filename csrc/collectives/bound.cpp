#include <algorithm>

#include "collectives/route.hpp"

namespace hecate {

namespace {

struct Traffic {
  explicit Traffic(const Request& request)
      : in(request.devices), out(request.devices), node_in(request.nodes()), node_out(request.nodes()) {}
  std::vector<std::int64_t> in, out, node_in, node_out;  // bytes

  void add(const Request& request, int expert) {
    const int owner = static_cast<int>(request.owner[expert]), home = request.node_of(owner);
    bool sends = false, leaves = false;
    for (int node = 0; node < request.nodes(); ++node) {
      const std::vector<int> there = request.holders(expert, node, owner);
      for (int d : there) in[d] += request.chunk_bytes;
      sends |= !there.empty();
      if (node == home || there.empty()) continue;
      node_in[node] += request.chunk_bytes;
      leaves = true;
    }
    if (sends) out[owner] += request.chunk_bytes;
    if (leaves) node_out[home] += request.chunk_bytes;
  }
};

std::int64_t largest(const std::vector<std::int64_t>& a, const std::vector<std::int64_t>& b) {
  return std::max(*std::max_element(a.begin(), a.end()), *std::max_element(b.begin(), b.end()));
}

}  // namespace

std::int64_t bound_ns(const Request& request) {
  Traffic traffic(request);
  for (int e = 0; e < request.experts; ++e) traffic.add(request, e);
  const Links& links = request.links;
  // A device may send within its node and to other nodes at the same time, so the two bounds are separate.
  const std::int64_t port = links.device + (request.nodes() > 1 ? links.crossing : 0);
  return std::max(wire_ns(largest(traffic.in, traffic.out), port),
                  wire_ns(largest(traffic.node_in, traffic.node_out), links.border));
}

}  // namespace hecate
