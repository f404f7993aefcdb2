// The forward loop as the backward loop uses it.
#ifndef SEPCONV_FORWARD_H_
#define SEPCONV_FORWARD_H_

#include <cstdint>

#include "sepconv.h"
#include "storage.h"

namespace sepconv {

// With `dz` set, the forward loop writes the gradient in front of the activation, dy * slope(z), to
// dz[pixel * stride + filter] instead of y: for activations whose slope does not follow from their
// output.
template <typename S>
struct OutputGradient {
  const S* dy = nullptr;
  ComputeType<S>* dz = nullptr;
  int64_t stride = 0;
};

template <typename S>
void RunForward(const Geometry& geometry, const ForwardArgs& args,
                const OutputGradient<S>& gradient);

}  // namespace sepconv

#endif  // SEPCONV_FORWARD_H_
