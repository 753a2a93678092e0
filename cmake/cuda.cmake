# nvcc, and how kernels are compiled. Included with COMPACT_CUDA only: other machines need neither nvcc nor a driver.
set(CMAKE_CUDA_ARCHITECTURES OFF)  # every kernel library names its own
enable_language(CUDA)
# CMake 3.25 does not know that nvcc 13 speaks C++20.
set(CMAKE_CUDA_STANDARD 20)
set(CMAKE_CUDA_EXTENSIONS OFF)
set(CMAKE_CUDA20_STANDARD_COMPILE_OPTION "-std=c++20")
find_package(CUDAToolkit 12.8 REQUIRED)
message(STATUS "CUDA kernels with nvcc ${CMAKE_CUDA_COMPILER_VERSION}")

# compact_add_kernels(<name> <architectures> SOURCES <file.cu ...>): an object library whose build fails if ptxas spills
# registers or serialises wgmma.
function(compact_add_kernels name architectures)
  cmake_parse_arguments(PARSE_ARGV 2 arg "" "" "SOURCES")
  add_library(${name} OBJECT ${arg_SOURCES})
  set_target_properties(${name} PROPERTIES CUDA_ARCHITECTURES "${architectures}" POSITION_INDEPENDENT_CODE ON)
  target_include_directories(${name} PRIVATE ${PROJECT_SOURCE_DIR} ${PROJECT_SOURCE_DIR}/include)
  target_compile_options(${name} PRIVATE --expt-relaxed-constexpr -Xptxas=-v)
  set_property(TARGET ${name} PROPERTY CUDA_COMPILER_LAUNCHER ${PROJECT_SOURCE_DIR}/scripts/check_ptxas
                                                               ${CMAKE_CUDA_COMPILER_LAUNCHER})
endfunction()
