# How pip compiles llama-cpp-python here (see `Environment.cmake`): CMake reads this after every project().

# For this very CPU; without image models and downloads, which Python code asks for by other ways.
set(GGML_NATIVE ON)
set(LLAVA_BUILD OFF)
set(LLAMA_OPENSSL OFF)

# The library of llama.cpp's own programs, two fifths of all files. Nothing in Python calls it.
set(LLAMA_BUILD_COMMON OFF)

# GCC 12 takes `ldtilecfg` to read 8 bytes of its 64, and drops the stores to the others as dead: on a CPU with AMX,
# llama.cpp 0.3.36 compiled by it ends with SIGSEGV at the first prompt of a Q8_0 or Q4_0 model
# (https://github.com/ggml-org/llama.cpp/issues/20824). This keeps them.
if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
  add_compile_options(-fno-dse)
endif()
