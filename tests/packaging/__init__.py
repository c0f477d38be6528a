"""Tests of builds, wheels and the machines that they are installed on."""
