// The channel with a cylinder of the DFG benchmark 2D-2 (Schaefer and Turek 1996).
// Mesh it with:  gmsh -2 cylinder.geo -format msh41 -o cylinder.msh   (cylinder.msh is by Gmsh 4.15.2)
SetFactory("OpenCASCADE");

far = 0.04;       // mesh size in the open channel
wake = 0.022;     // in the wake
near = 0.01;      // at the cylinder

Rectangle(1) = {0, 0, 0, 2.2, 0.41};
Disk(2) = {0.2, 0.2, 0, 0.05};
BooleanDifference(3) = { Surface{1}; Delete; }{ Surface{2}; Delete; };

eps = 1e-6;
inflow() = Curve In BoundingBox{-eps, -eps, -eps, eps, 0.41 + eps, eps};
outflow() = Curve In BoundingBox{2.2 - eps, -eps, -eps, 2.2 + eps, 0.41 + eps, eps};
walls() = Curve In BoundingBox{-eps, -eps, -eps, 2.2 + eps, eps, eps};
walls() += Curve In BoundingBox{-eps, 0.41 - eps, -eps, 2.2 + eps, 0.41 + eps, eps};
cylinder() = Curve In BoundingBox{0.15 - eps, 0.15 - eps, -eps, 0.25 + eps, 0.25 + eps, eps};

Physical Surface("fluid", 1) = {3};
Physical Curve("inflow", 1) = {inflow()};
Physical Curve("outflow", 2) = {outflow()};
Physical Curve("walls", 3) = {walls()};
Physical Curve("cylinder", 4) = {cylinder()};

Field[1] = Distance;
Field[1].CurvesList = {cylinder()};
Field[1].Sampling = 200;
Field[2] = Threshold;
Field[2].InField = 1;
Field[2].SizeMin = near;
Field[2].SizeMax = far;
Field[2].DistMin = 0.005;
Field[2].DistMax = 0.15;
Field[3] = Box;
Field[3].XMin = 0.2;
Field[3].XMax = 1.2;
Field[3].YMin = 0.1;
Field[3].YMax = 0.31;
Field[3].VIn = wake;
Field[3].VOut = far;
Field[3].Thickness = 0.4;
Field[4] = Min;
Field[4].FieldsList = {2, 3};
Background Field = 4;
Mesh.MeshSizeExtendFromBoundary = 0;
Mesh.MeshSizeFromPoints = 0;
Mesh.Algorithm = 6;  // Frontal-Delaunay
