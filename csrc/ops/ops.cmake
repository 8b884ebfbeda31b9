# The module _ops: importing it registers torch.ops.megalite.*. CPU kernels always; CUDA kernels where torch has CUDA and
# a toolkit is there. torch's own CMake files are not used, because they ask for every CUDA library that torch was built
# with.

execute_process(
  COMMAND ${Python_EXECUTABLE} ${CMAKE_CURRENT_LIST_DIR}/torch_paths.py
  OUTPUT_VARIABLE torch_paths RESULT_VARIABLE failed ERROR_VARIABLE error OUTPUT_STRIP_TRAILING_WHITESPACE)
if(failed)
  message(WARNING "No torch to build against (install torch first, then megalite with --no-build-isolation): "
                  "installing megalite without its operators. ${error}")
  return()
endif()
list(GET torch_paths 0 torch_includes)
string(REPLACE "|" ";" torch_includes "${torch_includes}")
list(GET torch_paths 1 torch_lib)
list(GET torch_paths 2 torch_cxx11_abi)
list(GET torch_paths 3 torch_cuda)

# Kernels are compiled once for each instruction set, and the one that the machine has is taken when they run.
if(CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64")
  set(isas base avx2 avx512)
else()
  set(isas base)
endif()
set(isa_flags_base)
set(isa_flags_avx2 -march=x86-64-v3)
set(isa_flags_avx512 -march=x86-64-v4 -mavx512bf16 -mprefer-vector-width=512)

file(GLOB cpu_kernels CONFIGURE_DEPENDS ${CMAKE_CURRENT_LIST_DIR}/cpu/*.cpp)
file(GLOB operators CONFIGURE_DEPENDS ${CMAKE_CURRENT_LIST_DIR}/*.cpp)
Python_add_library(_ops MODULE WITH_SOABI ${operators})
foreach(isa IN LISTS isas)
  add_library(kernels_${isa} OBJECT ${cpu_kernels})
  target_compile_options(kernels_${isa} PRIVATE
    ${isa_flags_${isa}} -O3 -Wno-psabi -fopenmp-simd -fno-math-errno -fno-trapping-math -ffp-contract=fast)
  target_compile_definitions(kernels_${isa} PRIVATE MEGALITE_ISA=${isa})
  target_compile_features(kernels_${isa} PRIVATE cxx_std_20)
  set_target_properties(kernels_${isa} PROPERTIES POSITION_INDEPENDENT_CODE ON CXX_VISIBILITY_PRESET hidden)
  target_link_libraries(_ops PRIVATE kernels_${isa})
endforeach()

target_compile_features(_ops PRIVATE cxx_std_20)
target_include_directories(_ops SYSTEM PRIVATE ${torch_includes})
# -fopenmp to compile torch's parallel_for, but no OpenMP library of our own: a second one would bring a second set of
# threads.
target_compile_options(_ops PRIVATE $<$<COMPILE_LANGUAGE:CXX>:-fopenmp>)
target_compile_definitions(_ops PRIVATE AT_PARALLEL_OPENMP=1 _GLIBCXX_USE_CXX11_ABI=${torch_cxx11_abi})
target_link_directories(_ops PRIVATE ${torch_lib})
# torch's headers take longer to compile than what a file does with them.
target_precompile_headers(_ops PRIVATE "$<$<COMPILE_LANGUAGE:CXX>:${CMAKE_CURRENT_LIST_DIR}/operator.h>")
target_link_libraries(_ops PRIVATE torch torch_cpu c10)
set_target_properties(_ops PROPERTIES CXX_VISIBILITY_PRESET hidden)
if(NOT isas STREQUAL "base")
  target_compile_definitions(_ops PRIVATE MEGALITE_X86)
endif()

if(torch_cuda)
  # Where torch itself looks for a toolkit that is not on the PATH.
  find_program(nvcc nvcc PATHS ENV CUDA_HOME /usr/local/cuda PATH_SUFFIXES bin)
  if(nvcc AND NOT DEFINED ENV{CUDACXX})
    set(ENV{CUDACXX} ${nvcc})
  endif()
  if(NOT DEFINED CMAKE_CUDA_ARCHITECTURES)
    set(CMAKE_CUDA_ARCHITECTURES 80-real 90a-real 90-virtual)
    set(gpus_by_toolkit ON)
  endif()
  check_language(CUDA)
  if(CMAKE_CUDA_COMPILER)
    enable_language(CUDA)
    string(REGEX MATCH "^[0-9]+" torch_cuda_major ${torch_cuda})
    if(gpus_by_toolkit AND CMAKE_CUDA_COMPILER_VERSION VERSION_GREATER_EQUAL 12.8)
      set(CMAKE_CUDA_ARCHITECTURES 80-real 90a-real 100)
    endif()
    set(with_cuda ON)
    # torch has loaded its own runtime by the time _ops is loaded: one of the same name and version serves both.
    if(NOT CMAKE_CUDA_COMPILER_VERSION MATCHES "^${torch_cuda_major}[.]")
      message(WARNING "torch has CUDA ${torch_cuda}, but ${CMAKE_CUDA_COMPILER} is of CUDA ${CMAKE_CUDA_COMPILER_VERSION}: "
                      "GPUs will run the reference of every operator. Set CUDACXX to the nvcc of a CUDA ${torch_cuda_major}")
      set(with_cuda OFF)
    endif()
  else()
    message(WARNING "torch has CUDA ${torch_cuda}, but there is no nvcc: GPUs will run the reference of every operator")
  endif()
endif()
if(with_cuda)
  file(GLOB cuda_kernels CONFIGURE_DEPENDS ${CMAKE_CURRENT_LIST_DIR}/cuda/*.cu)
  target_sources(_ops PRIVATE ${cuda_kernels})
  target_compile_definitions(_ops PRIVATE MEGALITE_CUDA)
  target_link_libraries(_ops PRIVATE torch_cuda)
  # Of the GPUs, _ops was made before they were known.
  set_target_properties(_ops PROPERTIES
    CUDA_ARCHITECTURES "${CMAKE_CUDA_ARCHITECTURES}" CUDA_STANDARD 17 CUDA_RUNTIME_LIBRARY Shared
    CUDA_VISIBILITY_PRESET hidden)
endif()

install(TARGETS _ops DESTINATION megalite)
