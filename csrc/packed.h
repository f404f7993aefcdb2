// A pointwise kernel that was packed for many forward calls.
#ifndef SEPCONV_PACKED_H_
#define SEPCONV_PACKED_H_

#include <cstdint>

#include "buffer.h"
#include "kernels.h"

namespace sepconv {

struct PackedPointwise {
  const Target& target;  // what was packed for another one is of no use
  bool pairs;            // of bfloat16, in place of elements of the compute type
  LeastLanes least;      // of the pairs; see PairKernels
  Buffer data;           // panel[depth or pairs][width], as Panels cuts them
};

}  // namespace sepconv

#endif  // SEPCONV_PACKED_H_
