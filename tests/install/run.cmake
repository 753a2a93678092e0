# Installs the build into a fresh prefix, builds examples/cpp against it from outside, and runs it.
#   cmake -DSOURCE=<repository> -DBUILD=<build directory> -DWORK=<scratch> -P run.cmake
file(REMOVE_RECURSE ${WORK})
foreach(command
    "${CMAKE_COMMAND} --install ${BUILD} --prefix ${WORK}/prefix"
    "${CMAKE_COMMAND} -S ${SOURCE}/examples/cpp -B ${WORK}/build -G Ninja -DCMAKE_BUILD_TYPE=Release -DCMAKE_PREFIX_PATH=${WORK}/prefix"
    "${CMAKE_COMMAND} --build ${WORK}/build"
    "${WORK}/build/prefill_chunk")
  separate_arguments(command UNIX_COMMAND "${command}")
  execute_process(COMMAND ${command} COMMAND_ERROR_IS_FATAL ANY)
endforeach()
