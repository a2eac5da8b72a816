"""Scalar curvature of any smooth map."""
