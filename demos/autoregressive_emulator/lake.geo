// A lake with two islands, one unit long.
// Mesh it with:  gmsh -2 lake.geo -format msh41 -o lake.msh   (lake.msh is by Gmsh 4.15.2)
SetFactory("OpenCASCADE");

far = 0.05;    // mesh size on the open water
near = 0.035;  // mesh size at the islands

// The shore: a closed spline.
Point(1) = {0.00, 0.36, 0, far};
Point(2) = {0.10, 0.68, 0, far};
Point(3) = {0.36, 0.80, 0, far};
Point(4) = {0.62, 0.70, 0, far};
Point(5) = {0.86, 0.78, 0, far};
Point(6) = {1.00, 0.52, 0, far};
Point(7) = {0.90, 0.18, 0, far};
Point(8) = {0.64, 0.06, 0, far};
Point(9) = {0.42, 0.13, 0, far};
Point(10) = {0.18, 0.06, 0, far};
Spline(1) = {1 ... 10, 1};
Curve Loop(1) = {1};
Plane Surface(1) = {1};

Disk(2) = {0.30, 0.46, 0, 0.14, 0.10};
Disk(3) = {0.74, 0.40, 0, 0.07};
BooleanDifference(4) = { Surface{1}; Delete; }{ Surface{2:3}; Delete; };

MeshSize{ PointsOf{ Surface{4}; } } = far;
island() = Point In BoundingBox {0.1, 0.3, -1, 0.85, 0.6, 1};
MeshSize{ island() } = near;
Mesh.Algorithm = 6;

Physical Curve("shore", 1) = Boundary{ Surface{4}; };
Physical Surface("water", 1) = {4};
