# Defines gptq::torch, the part of an installed torch that libgptq compiles and links against.
#
# find_package(Torch) is not used: with a CUDA wheel of torch it insists on the CUDA toolkit, which a machine
# without a GPU need not have, and it breaks where CMake is older than that toolkit's nvcc. The headers and two
# libraries are all that is needed, so they are imported here. libtorch.so itself holds no code: it only pulls in
# the CUDA libraries, which cost every process that links it 0.4 s and 350 MB.
#
# GPTQ_TORCH_DIR names the torch package folder (the one that holds include/ and lib/). Without it,
# Torch_DIR, CMAKE_PREFIX_PATH and the Python interpreter in use are asked, in that order.

set(GPTQ_TORCH_DIR "" CACHE PATH "torch package folder, with include/ and lib/ in it")

function(gptq_find_torch_dir out)
  set(candidates ${GPTQ_TORCH_DIR})
  if(NOT candidates)
    if(Torch_DIR)
      list(APPEND candidates ${Torch_DIR}/../../..)
    endif()
    foreach(prefix IN LISTS CMAKE_PREFIX_PATH)
      list(APPEND candidates ${prefix} ${prefix}/../..)
    endforeach()
    find_package(Python3 QUIET COMPONENTS Interpreter)
    if(Python3_FOUND)
      execute_process(COMMAND ${Python3_EXECUTABLE} -c
                              "import importlib.util as u; print(u.find_spec('torch').submodule_search_locations[0])"
                      OUTPUT_VARIABLE from_python OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
      list(APPEND candidates ${from_python})
    endif()
  endif()
  foreach(candidate IN LISTS candidates)
    if(EXISTS ${candidate}/include/torch/script.h OR EXISTS ${candidate}/include/torch/csrc/api/include/torch/script.h)
      if(EXISTS ${candidate}/lib/libtorch_cpu.so)
        get_filename_component(candidate ${candidate} ABSOLUTE)
        set(${out} ${candidate} PARENT_SCOPE)
        return()
      endif()
    endif()
  endforeach()
  message(FATAL_ERROR "torch was not found: set GPTQ_TORCH_DIR to the torch package folder, the one that "
                      "`python -c \"import torch; print(torch.__path__[0])\"` prints")
endfunction()

if(NOT TARGET gptq::torch)
  gptq_find_torch_dir(GPTQ_TORCH_ROOT)
  file(STRINGS ${GPTQ_TORCH_ROOT}/include/torch/headeronly/version.h version_lines REGEX "#define TORCH_VERSION_M")
  string(REGEX REPLACE ".*TORCH_VERSION_MAJOR +([0-9]+).*" "\\1" torch_major "${version_lines}")
  string(REGEX REPLACE ".*TORCH_VERSION_MINOR +([0-9]+).*" "\\1" torch_minor "${version_lines}")
  set(GPTQ_TORCH_VERSION ${torch_major}.${torch_minor})
  if(GPTQ_TORCH_VERSION VERSION_LESS 2.11)
    message(FATAL_ERROR "libgptq needs torch 2.11 or newer, found ${GPTQ_TORCH_VERSION} in ${GPTQ_TORCH_ROOT}")
  endif()
  message(STATUS "torch ${GPTQ_TORCH_VERSION} in ${GPTQ_TORCH_ROOT}")

  set(torch_libraries)
  foreach(library c10 torch_cpu)
    add_library(gptq::torch_${library} SHARED IMPORTED)
    set_target_properties(gptq::torch_${library} PROPERTIES
                          IMPORTED_LOCATION ${GPTQ_TORCH_ROOT}/lib/lib${library}.so)
    list(APPEND torch_libraries gptq::torch_${library})
  endforeach()
  # at::parallel_for is a template around OpenMP pragmas; compiled without it, it is silently serial. The
  # runtime must be the one that torch itself loads.
  file(GLOB torch_openmp ${GPTQ_TORCH_ROOT}/lib/libgomp*.so*)
  if(torch_openmp)
    list(GET torch_openmp 0 torch_openmp)
  else()
    set(torch_openmp gomp)
  endif()

  add_library(gptq::torch INTERFACE IMPORTED)
  target_include_directories(gptq::torch SYSTEM INTERFACE ${GPTQ_TORCH_ROOT}/include
                                                          ${GPTQ_TORCH_ROOT}/include/torch/csrc/api/include)
  target_compile_features(gptq::torch INTERFACE cxx_std_20)
  target_compile_options(gptq::torch INTERFACE $<$<COMPILE_LANGUAGE:CXX>:-fopenmp>)
  target_link_libraries(gptq::torch INTERFACE ${torch_libraries} ${torch_openmp})
  # libtorch_cpu of a CUDA wheel needs CUDA libraries that it finds by its own run path, which the linker does
  # not follow.
  target_link_options(gptq::torch INTERFACE LINKER:--allow-shlib-undefined)
endif()
