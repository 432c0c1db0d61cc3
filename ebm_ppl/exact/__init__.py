"""log Z by quadrature and by enumeration."""
