// A body with a grounded electrode in it, one unit long.
// Mesh it with:  gmsh -2 body.geo -format msh41 -o body.msh   (body.msh is by Gmsh 4.8.4)
SetFactory("OpenCASCADE");

far = 0.01626; // mesh size inside
near = 0.0125; // mesh size at the electrode

// The skin: a closed spline.
Point(1) = {0.00, 0.44, 0, far};
Point(2) = {0.09, 0.70, 0, far};
Point(3) = {0.30, 0.83, 0, far};
Point(4) = {0.56, 0.77, 0, far};
Point(5) = {0.82, 0.80, 0, far};
Point(6) = {1.00, 0.55, 0, far};
Point(7) = {0.93, 0.24, 0, far};
Point(8) = {0.68, 0.10, 0, far};
Point(9) = {0.40, 0.14, 0, far};
Point(10) = {0.13, 0.16, 0, far};
Spline(1) = {1 ... 10, 1};
Curve Loop(1) = {1};
Plane Surface(1) = {1};

Disk(2) = {0.50, 0.45, 0, 0.05};
BooleanDifference(3) = { Surface{1}; Delete; }{ Surface{2}; Delete; };

electrode() = Curve In BoundingBox{0.44, 0.39, -1, 0.56, 0.51, 1};
skin() = Boundary{ Surface{3}; };
skin() = Abs(skin());
skin() -= electrode();
MeshSize{ PointsOf{ Surface{3}; } } = far;
MeshSize{ PointsOf{ Curve{electrode()}; } } = near;
Mesh.Algorithm = 6;  // Frontal-Delaunay

Physical Curve("skin", 1) = {skin()};
Physical Curve("electrode", 2) = {electrode()};
Physical Surface("body", 3) = {3};
