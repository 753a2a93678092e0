# install(): headers, the library and a package that find_package(CompactAttention) finds.
include(GNUInstallDirs)
include(CMakePackageConfigHelpers)

install(TARGETS compact EXPORT CompactAttentionTargets)
install(DIRECTORY include/compact DESTINATION ${CMAKE_INSTALL_INCLUDEDIR})
install(EXPORT CompactAttentionTargets NAMESPACE compact:: DESTINATION ${CMAKE_INSTALL_LIBDIR}/cmake/CompactAttention)
configure_package_config_file(cmake/CompactAttentionConfig.cmake.in CompactAttentionConfig.cmake
                              INSTALL_DESTINATION ${CMAKE_INSTALL_LIBDIR}/cmake/CompactAttention)
write_basic_package_version_file(CompactAttentionConfigVersion.cmake COMPATIBILITY SameMinorVersion)
install(FILES ${CMAKE_CURRENT_BINARY_DIR}/CompactAttentionConfig.cmake
              ${CMAKE_CURRENT_BINARY_DIR}/CompactAttentionConfigVersion.cmake
        DESTINATION ${CMAKE_INSTALL_LIBDIR}/cmake/CompactAttention)
if(TARGET compact_cli)
  install(TARGETS compact_cli)
endif()
