# Compile options that every target of this project gets; a consumer of the library inherits none of them.
add_library(compact_options INTERFACE)
target_compile_options(compact_options INTERFACE -Wall -Wextra -Wconversion -Wshadow)
if(COMPACT_DEVELOPER)
  target_compile_options(compact_options INTERFACE -Werror)
endif()
if(COMPACT_SANITIZE)
  target_compile_options(compact_options INTERFACE -fsanitize=${COMPACT_SANITIZE} -fno-omit-frame-pointer
                                                   -fno-sanitize-recover=all)
  target_link_options(compact_options INTERFACE -fsanitize=${COMPACT_SANITIZE})
endif()
