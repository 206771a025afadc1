// The part of ONNX Runtime's C API that operator.cpp uses. Its wheels come without headers, and an operator needs
// none of its symbols: everything is reached through a table of function pointers that only ever grows at its end.
//
// Positions and layouts were compared with the official onnxruntime_c_api.h of API version 29 (a release archive has
// it), by a program that includes both: static assertions that offsetof(OrtApi, Name) is position * sizeof(void*) for
// each function here, that the members of CustomOp have their offsets, and that all types are the same but for
// enumerations, which are int here.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(_WIN32)
#define OWL_ORT_CALL __stdcall
#else
#define OWL_ORT_CALL
#endif

// ONNX Runtime's own types, of which we only hold pointers; outside of our namespace, where its header has them.
struct OrtStatus;
struct OrtValue;
struct OrtKernelInfo;
struct OrtKernelContext;
struct OrtCustomOpDomain;
struct OrtSessionOptions;
struct OrtShapeInferContext;
struct OrtTensorTypeAndShapeInfo;
struct OrtApi;

struct OrtApiBase {
  const OrtApi*(OWL_ORT_CALL* GetApi)(std::uint32_t version);  // null where the runtime is older than `version`
  const char*(OWL_ORT_CALL* GetVersionString)();
};

namespace owl::ort {

// KernelContext_ParallelFor came last of what is used, with 1.17.
inline constexpr std::uint32_t kApiVersion = 17;

// The enumerations are C's, of the size of an int.
using ErrorCode = int;
inline constexpr ErrorCode kFail = 1;
inline constexpr ErrorCode kInvalidArgument = 2;

using ElementType = int;
inline constexpr ElementType kFloat = 1;
inline constexpr ElementType kUint8 = 2;

using Characteristic = int;
inline constexpr Characteristic kRequired = 0;

using MemoryType = int;
inline constexpr MemoryType kDefaultMemory = 0;

struct CustomOp;

// A function of the table: called as `create_status(api, code, message)`. Those that return a status return null
// for success; a status is the caller's to release, or to return to ONNX Runtime.
template <std::size_t Position, typename Signature>
struct Function;

template <std::size_t Position, typename Result, typename... Arguments>
struct Function<Position, Result(Arguments...)> {
  using Pointer = Result(OWL_ORT_CALL*)(Arguments...);
  static constexpr std::size_t position = Position;

  Result operator()(const OrtApi* api, Arguments... arguments) const {
    return reinterpret_cast<const Pointer*>(api)[Position](arguments...);
  }
};

inline constexpr Function<0, OrtStatus*(ErrorCode, const char* message)> create_status{};

inline constexpr Function<26, OrtStatus*(const char* name, OrtCustomOpDomain**)> create_custom_op_domain{};
inline constexpr Function<27, OrtStatus*(OrtCustomOpDomain*, const CustomOp*)> custom_op_domain_add{};
inline constexpr Function<28, OrtStatus*(OrtSessionOptions*, OrtCustomOpDomain*)> add_custom_op_domain{};
inline constexpr Function<130, OrtStatus*(OrtSessionOptions*, const char* key, const char* value)>
    add_session_config_entry{};
inline constexpr Function<237, OrtStatus*(const OrtSessionOptions*, const char* key, int* found)>
    has_session_config_entry{};
inline constexpr Function<101, void(OrtCustomOpDomain*)> release_custom_op_domain{};

// The data is the value's, and goes with it.
inline constexpr Function<51, OrtStatus*(OrtValue*, void** data)> get_tensor_mutable_data{};
inline constexpr Function<65, OrtStatus*(const OrtValue*, OrtTensorTypeAndShapeInfo**)> get_tensor_type_and_shape{};
inline constexpr Function<60, OrtStatus*(const OrtTensorTypeAndShapeInfo*, ElementType*)> get_tensor_element_type{};
inline constexpr Function<61, OrtStatus*(const OrtTensorTypeAndShapeInfo*, std::size_t*)> get_dimensions_count{};
inline constexpr Function<62, OrtStatus*(const OrtTensorTypeAndShapeInfo*, std::int64_t*, std::size_t rank)>
    get_dimensions{};
inline constexpr Function<99, void(OrtTensorTypeAndShapeInfo*)> release_tensor_type_and_shape_info{};

// `name` null: only the size, terminating zero included.
inline constexpr Function<244, OrtStatus*(const OrtKernelInfo*, char* name, std::size_t* size)> kernel_info_node_name{};
// The value is the session's: it lives as long as the kernel.
inline constexpr Function<249, OrtStatus*(const OrtKernelInfo*, std::size_t index, int* is_constant, const OrtValue**)>
    kernel_info_constant_input{};

inline constexpr Function<90, OrtStatus*(const OrtKernelContext*, std::size_t index, const OrtValue**)>
    kernel_context_input{};
inline constexpr Function<91, OrtStatus*(OrtKernelContext*, std::size_t index, const std::int64_t* dimensions,
                                         std::size_t rank, OrtValue**)>
    kernel_context_output{};
// Calls function(user, 0) to function(user, total - 1) on the session's threads, the calling one among them, and
// returns when all have.
inline constexpr Function<274, OrtStatus*(const OrtKernelContext*, void (*function)(void*, std::size_t),
                                          std::size_t total, std::size_t batches, void* user)>
    kernel_context_parallel_for{};

// OrtCustomOp as of version 17: what was appended later is not read where `version` says 17.
struct CustomOp {
  std::uint32_t version;
  void*(OWL_ORT_CALL* create_kernel)(const CustomOp*, const OrtApi*, const OrtKernelInfo*);
  const char*(OWL_ORT_CALL* name)(const CustomOp*);
  const char*(OWL_ORT_CALL* execution_provider)(const CustomOp*);
  ElementType(OWL_ORT_CALL* input_type)(const CustomOp*, std::size_t index);
  std::size_t(OWL_ORT_CALL* input_count)(const CustomOp*);
  ElementType(OWL_ORT_CALL* output_type)(const CustomOp*, std::size_t index);
  std::size_t(OWL_ORT_CALL* output_count)(const CustomOp*);
  void(OWL_ORT_CALL* compute)(void* kernel, OrtKernelContext*);
  void(OWL_ORT_CALL* destroy_kernel)(void* kernel);
  Characteristic(OWL_ORT_CALL* input_characteristic)(const CustomOp*, std::size_t index);
  Characteristic(OWL_ORT_CALL* output_characteristic)(const CustomOp*, std::size_t index);
  MemoryType(OWL_ORT_CALL* input_memory_type)(const CustomOp*, std::size_t index);
  int(OWL_ORT_CALL* variadic_input_min_arity)(const CustomOp*);
  int(OWL_ORT_CALL* variadic_input_homogeneity)(const CustomOp*);
  int(OWL_ORT_CALL* variadic_output_min_arity)(const CustomOp*);
  int(OWL_ORT_CALL* variadic_output_homogeneity)(const CustomOp*);
  OrtStatus*(OWL_ORT_CALL* create_kernel_v2)(const CustomOp*, const OrtApi*, const OrtKernelInfo*, void** kernel);
  OrtStatus*(OWL_ORT_CALL* compute_v2)(void* kernel, OrtKernelContext*);
  OrtStatus*(OWL_ORT_CALL* infer_output_shape)(const CustomOp*, OrtShapeInferContext*);
  int(OWL_ORT_CALL* start_version)(const CustomOp*);
  int(OWL_ORT_CALL* end_version)(const CustomOp*);
};
static_assert(sizeof(CustomOp) == 22 * sizeof(void*));

}  // namespace owl::ort
