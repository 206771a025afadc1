#include "kernels/isa_neon.h"
#include "kernels/product.h"

namespace owl {

extern const Kernels kNeonKernels;
constexpr Kernels kNeonKernels = kernels_of<Neon>(Formats{});

}  // namespace owl
